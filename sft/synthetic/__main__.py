"""`python -m sft.synthetic DIR`: writes procedural vessel images and masks."""

import sys

from sft.synthetic import main

sys.exit(main())
