"""A procedural 3D head, drawn in torch: identity, expression, pose, light and the rest apart."""
