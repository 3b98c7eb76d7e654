"""Names under which the parts of the service find each other on a Ray cluster."""

APPLICATION = "mentor"
"""The Serve application."""

NAMESPACE = "mentor"
"""Ray namespace of the detached actors."""

GATEWAY = "Gateway"
POLICY = "Policy"
EXPERT = "Expert"
COLLECTOR = "Collector"

WEIGHT_STORE = "weight_store"
LEARNER = "learner"
