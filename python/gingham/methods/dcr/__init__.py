"""DCR: decoupled classification refinement of detections."""
