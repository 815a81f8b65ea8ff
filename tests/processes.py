"""Several processes of one test."""

import os
import pickle
import signal
import socket
import time
import traceback
from pathlib import Path

import torch

from lasnn_sj.runtime import distributed


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(call, processes=2):
    """``call(rank)`` in forked processes that find torchrun's environment; their results by rank."""
    port, pipes, children = free_port(), [], []
    for rank in range(processes):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {
                    "TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
                distributed.initialise(torch.device("cpu"))
                result = call(rank)
                with open(write, "wb") as file:
                    file.write(pickle.dumps(result))
                torch.distributed.destroy_process_group()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(write)
        pipes.append(read)
        children.append(child)
    results = [open(read, "rb").read() for read in pipes]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * processes
    return [pickle.loads(result) for result in results]


def kill_a_worker_after_a_checkpoint(launcher, folder):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir()):
            children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            return True
        time.sleep(0.02)
    return False
