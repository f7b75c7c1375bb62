"""`python -m gingham.bench`."""

import sys

from gingham.bench import main

sys.exit(main())
