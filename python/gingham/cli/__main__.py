"""``python -m gingham.cli``."""

import sys

from gingham.cli import main

sys.exit(main())
