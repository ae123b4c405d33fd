"""`python -m diffusers_pqcad.cli`, the same as `pqcad`."""

import sys

from diffusers_pqcad.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
