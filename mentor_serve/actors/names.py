"""Names under which the parts of the service find each other on a Ray cluster."""

APPLICATION = "mentor"
"""The Serve application, as `mentor-serve up` and apps/production.yaml name it."""

NAMESPACE = "mentor"
"""Ray namespace of the detached actors."""

GATEWAY = "Gateway"
POLICY = "Policy"
EXPERT = "Expert"
COLLECTOR = "Collector"

WEIGHT_STORE = "weight_store"
LEARNER = "learner"
EVALUATOR = "evaluator"
