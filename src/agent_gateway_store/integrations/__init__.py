"""The store in the frameworks that gateways are built on; each module needs the extra of its name."""
