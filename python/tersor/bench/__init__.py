"""Microbenchmarks on the machine at hand: `tersor bench`. timing.py times, machine.py knows the limits, layers.py has the cases."""
