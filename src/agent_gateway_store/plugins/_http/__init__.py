"""HTTP from the bundled notifiers to the outside: which addresses, how long, how much."""
