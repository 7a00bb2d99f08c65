//! Model files: what is inside a checkpoint, whichever container and packing it came in.
