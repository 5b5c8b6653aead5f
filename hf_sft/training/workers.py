"""What a loader's worker process does on SIGTERM."""

from __future__ import annotations

import os
import signal
import threading


def outlive_termination() -> None:
    """Let only the process that began this worker end it by SIGTERM.

    A scheduler sends the signal to every process of a job. Training then takes its last step, for which it needs batches, and
    ends its workers by the same signal; signals of others are taken and dropped. Does nothing where a signal does not say who
    sent it (macOS).
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            continue
        os._exit(0)

    threading.Thread(target=wait, name="termination", daemon=True).start()
