"""Plans a run before it is launched: compiled for its accelerators without one, and counted."""
