"""`python -m nsa_dist`: the command line, also where the script `nsa-dist` isn't on the path (torchrun -m)."""

import sys

from nsa_dist.cli import main

sys.exit(main())
