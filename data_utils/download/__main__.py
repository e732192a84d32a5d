import sys

from data_utils.download.downloads import main
from data_utils.errors import run_main

if __name__ == "__main__":
    sys.exit(run_main(main))
