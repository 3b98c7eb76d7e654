"""The Ray code: Serve deployments, detached actors and what wires the layers below together."""
