"""`python -m hf_featreuse` is the command `featreuse`."""

import sys

from hf_featreuse.cli import main

sys.exit(main())
