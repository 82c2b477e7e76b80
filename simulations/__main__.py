"""`python -m simulations [key=value ...]`: run a scenario through `flwr run`."""

import sys

from simulations.launch import main

sys.exit(main())
