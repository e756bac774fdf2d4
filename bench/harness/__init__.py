"""How a case is built, checked, timed in one process an engine, and told: nothing here knows a particular suite."""
