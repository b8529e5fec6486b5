"""The server on several accelerators or machines: replicas, their health and their number are Ray Serve's business."""
