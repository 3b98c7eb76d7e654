"""The live view of training: Streamlit pages that read the trajectory store and nothing else.

Pages never write, never talk to the service, and never hold a connection between two refreshes,
so a dashboard can be opened, left and killed at any time without training noticing.
"""
