import os
import sys
from contextlib import suppress

from data_utils.errors import run_main
from data_utils.grow.run import INTERRUPTED, main

if __name__ == "__main__":
    with suppress(BrokenPipeError):
        status = run_main(main)
        if status == INTERRUPTED:
            sys.stdout.flush()
            os._exit(status)  # an exit would wait for the requests that were given up
        sys.exit(status)
