"""`truestep verify`: real trainings in lockstep with the reference, as an installed program runs them."""
