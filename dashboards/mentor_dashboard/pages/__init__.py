"""One module a page; each offers `page()`, the body that `st.Page` calls."""
