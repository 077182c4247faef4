"""The demonstration: a small gateway with tools on real files, and the history of a made-up company."""
