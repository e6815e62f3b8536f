"""`python -m firewall.datapath OPTIONS...`: a verdict worker.

What it does is in `process`.
"""

import sys

from firewall.datapath.process import main

if __name__ == "__main__":
    sys.exit(main())
