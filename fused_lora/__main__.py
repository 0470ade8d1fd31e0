import sys

from fused_lora.cli import main

sys.exit(main())
