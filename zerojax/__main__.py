"""`python -m zerojax`: the `zerojax` command."""

import sys

from zerojax.cli import main

sys.exit(main())
