"""`python -m sft.data DIR`: checks a folder of images and masks and prints what it found."""

import sys

from sft.data import main

sys.exit(main())
