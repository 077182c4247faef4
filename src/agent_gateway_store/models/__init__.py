"""Tables and values. No I/O. `values` loads no ORM, so import from the modules."""
