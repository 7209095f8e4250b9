"""`python -m banger` is the command line."""

import sys

from banger.cli.main import main

sys.exit(main())
