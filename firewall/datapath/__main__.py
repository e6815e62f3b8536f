"""`python -m firewall.datapath OPTIONS...`: a verdict worker.

Apart from `worker`, because Python runs no compiled module as a program.
"""

import sys

from firewall.datapath.worker import main

if __name__ == "__main__":
    sys.exit(main())
