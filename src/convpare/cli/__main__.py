"""`python -m convpare.cli`, which `accelerate launch -m convpare.cli` and torchrun start."""

from convpare.cli import main

main()
