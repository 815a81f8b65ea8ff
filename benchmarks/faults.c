/* Kills, signals or fails the n-th call of a process that changes a file below a folder.
 *
 * Preloaded (LD_PRELOAD) by faults.py, which arms it in a child of its own by faults_arm(). Counted are open for
 * writing, write, rename, unlink, rmdir, mkdir, link, ftruncate and fsync; others, and files elsewhere, pass.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* What happens: SIGKILL before the call or in the middle of a write, a signal before it (TWICE: before the next
 * one, too), an error of this call, no space from this call on, half a write (the caller has to write the rest),
 * half a write and then no space. */
enum { NOTHING, KILL, TEAR, SIGNAL, TWICE, FAIL, FULL, SHORT, HALF_FULL };

static struct shared { /* seen by the parent when the child is gone */
    atomic_long calls;
    char last[PATH_MAX + 32];
} *shared;

static char folder[PATH_MAX];
static size_t length;
static pid_t owner;
static int action, value;
static long at;

__attribute__((constructor)) static void begin(void)
{
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    unsetenv("LD_PRELOAD"); /* not of the programs that this one starts */
}

long faults_calls(void) { return shared->calls; }
const char *faults_last(void) { return shared->last; }

void faults_arm(const char *below, int what, long number, int parameter)
{
    length = strlen(strncpy(folder, below, sizeof folder - 1));
    action = what, at = number, value = parameter, owner = getpid();
    shared->calls = 0;
    shared->last[0] = 0;
}

/* Path of a file that is open (dirfd with a name under it, or a name alone) below the folder. */
static int concerns(int fd, const char *name, char *path)
{
    path[0] = 0;
    if (!owner || getpid() != owner)
        return 0;
    if (name && name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        char link[40];
        if (fd == AT_FDCWD)
            strcpy(link, "/proc/self/cwd");
        else
            snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        long size = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
        if (size < 0)
            return 0;
        path[size] = 0;
        if (name && strlen(path) + strlen(name) + 2 < PATH_MAX)
            strcat(strcat(path, "/"), name);
    }
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* Count a call. Returns 0 to let it pass, -1 (with errno) to fail it, or 1 to write half. */
static int due(const char *what, const char *path, int takes_space, int writes)
{
    long number = atomic_fetch_add(&shared->calls, 1) + 1;
    int whole = action == TEAR || action == SHORT || action == HALF_FULL; /* these wait for a write */
    if (number < at || action == NOTHING)
        return 0;
    if (number == at || whole)
        snprintf(shared->last, sizeof shared->last, "%s %s", what, path);
    switch (action) {
    case KILL:
        kill(getpid(), SIGKILL);
        return 0;
    case SIGNAL:
    case TWICE:
        if (number <= at + (action == TWICE))
            kill(getpid(), value);
        return 0;
    case FAIL:
        if (number > at)
            return 0;
        errno = value;
        return -1;
    case FULL:
        if (!takes_space)
            return 0;
        errno = ENOSPC;
        return -1;
    }
    if (!writes)
        return 0;
    if (action == HALF_FULL)
        action = FULL;
    else if (action == SHORT)
        action = NOTHING;
    return 1;
}

static int guarded(const char *what, int fd, const char *name, int takes_space)
{
    char path[PATH_MAX];
    return concerns(fd, name, path) ? due(what, path, takes_space, 0) : 0;
}

static int opens(int fd, const char *name, int flags, unsigned mode)
{
    if ((flags & (O_ACCMODE | O_CREAT | O_TRUNC)) && guarded("open", fd, name, flags & O_CREAT))
        return -1;
    return syscall(SYS_openat, fd, name, flags, mode);
}

#define MODE \
    unsigned mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, unsigned); \
        va_end(rest); \
    }

int open(const char *name, int flags, ...) { MODE return opens(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE return opens(AT_FDCWD, name, flags, mode); }
int openat(int fd, const char *name, int flags, ...) { MODE return opens(fd, name, flags, mode); }
int openat64(int fd, const char *name, int flags, ...) { MODE return opens(fd, name, flags, mode); }

ssize_t write(int fd, const void *data, size_t size)
{
    char path[PATH_MAX];
    if (size && concerns(fd, NULL, path)) {
        int what = due("write", path, 1, size > 1);
        if (what < 0)
            return -1;
        if (what > 0) {
            ssize_t half = syscall(SYS_write, fd, data, size / 2);
            if (action == TEAR)
                kill(getpid(), SIGKILL);
            return half;
        }
    }
    return syscall(SYS_write, fd, data, size);
}

int rename(const char *from, const char *to)
{
    return guarded("rename", AT_FDCWD, to, 0) ? -1 : syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int renameat(int one, const char *from, int other, const char *to)
{
    return guarded("rename", other, to, 0) ? -1 : syscall(SYS_renameat2, one, from, other, to, 0);
}

int unlink(const char *name)
{
    return guarded("unlink", AT_FDCWD, name, 0) ? -1 : syscall(SYS_unlinkat, AT_FDCWD, name, 0);
}

int unlinkat(int fd, const char *name, int flags)
{
    return guarded("unlink", fd, name, 0) ? -1 : syscall(SYS_unlinkat, fd, name, flags);
}

int rmdir(const char *name)
{
    return guarded("rmdir", AT_FDCWD, name, 0) ? -1 : syscall(SYS_unlinkat, AT_FDCWD, name, AT_REMOVEDIR);
}

int mkdir(const char *name, mode_t mode)
{
    return guarded("mkdir", AT_FDCWD, name, 1) ? -1 : syscall(SYS_mkdirat, AT_FDCWD, name, mode);
}

int mkdirat(int fd, const char *name, mode_t mode)
{
    return guarded("mkdir", fd, name, 1) ? -1 : syscall(SYS_mkdirat, fd, name, mode);
}

int link(const char *from, const char *to)
{
    return guarded("link", AT_FDCWD, to, 1) ? -1 : syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int linkat(int one, const char *from, int other, const char *to, int flags)
{
    return guarded("link", other, to, 1) ? -1 : syscall(SYS_linkat, one, from, other, to, flags);
}

int ftruncate(int fd, off_t size) { return guarded("ftruncate", fd, NULL, 1) ? -1 : syscall(SYS_ftruncate, fd, size); }
int ftruncate64(int fd, off_t size) { return guarded("ftruncate", fd, NULL, 1) ? -1 : syscall(SYS_ftruncate, fd, size); }
int fsync(int fd) { return guarded("fsync", fd, NULL, 0) ? -1 : syscall(SYS_fsync, fd); }
int fdatasync(int fd) { return guarded("fsync", fd, NULL, 0) ? -1 : syscall(SYS_fdatasync, fd); }
