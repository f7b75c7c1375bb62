"""`python -m gingham.bench`: `gingham bench` for machines without the command line's other dependencies."""

import sys

from gingham.bench import main
from gingham.errors import GinghamError

try:
    sys.exit(main())
except (GinghamError, OSError) as error:
    print(f"gingham bench: error: {error}", file=sys.stderr)
    sys.exit(2)
