"""Entry point of the dashboard: `streamlit run dashboards/app.py`.

The database is found as the service finds it, from the `MENTOR_SERVE_*` environment.
"""

from pathlib import Path

import streamlit as st

from mentor_dashboard.pages import experiments, guidance, learner, overview, trajectories

st.set_page_config(
    page_title="mentor-serve", page_icon=str(Path(__file__).with_name("icon.svg")), layout="wide"
)
st.navigation(
    [
        st.Page(overview.page, title="Overview", icon=":material/monitoring:", default=True),
        st.Page(guidance.page, title="Guidance", icon=":material/school:", url_path="guidance"),
        st.Page(
            learner.page, title="Learner", icon=":material/model_training:", url_path="learner"
        ),
        st.Page(
            trajectories.page,
            title="Trajectories",
            icon=":material/notes:",
            url_path="trajectories",
        ),
        st.Page(
            experiments.page, title="Experiments", icon=":material/science:", url_path="experiments"
        ),
    ]
).run()
