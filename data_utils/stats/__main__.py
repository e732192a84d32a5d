import sys

from data_utils.errors import run_main
from data_utils.stats.measure import main

if __name__ == "__main__":
    sys.exit(run_main(main))
