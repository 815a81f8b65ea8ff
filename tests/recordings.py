"""Event recordings of random events, written as DVS-Gesture's files are."""

import numpy as np


def recording(n=100, size=128, seed=0):
    """Columns x, y, p, t (milliseconds, in order), as in a file of DVS-Gesture."""
    r = np.random.RandomState(seed)
    t = np.sort(r.randint(0, 300, n))
    return np.stack([r.randint(0, size, n), r.randint(0, size, n), r.randint(0, 2, n), t], 1)


def write_gestures(root, users=10):
    """Both splits: a file for each user and class, with 40 to 99 events."""
    for split, folder in enumerate(("ibmGestureTrain", "ibmGestureTest")):
        for user in range(users):
            place = root / "DVSGesture" / folder / f"user{user + 1:02d}_led"
            place.mkdir(parents=True)
            for label in range(11):
                seed = 10_000 * split + 100 * user + label
                np.save(place / f"{label}.npy", recording(40 + seed % 60, seed=seed))
        (root / "DVSGesture" / f"{folder}.tar.gz").touch()
