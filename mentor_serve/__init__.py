"""mentor-serve: a language model that gets better while it serves, by the MENTOR method.

Importing this package pulls in neither torch nor ray; import the part you need, for instance
`mentor_serve.engines` or `mentor_serve.core.entropy`.
"""

__version__ = "0.1.0"
