"""Transfer sets by retrieval: the images of a large gallery that are most like the few images of a task."""
