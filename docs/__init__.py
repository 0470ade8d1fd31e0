"""The manual: pages in Markdown, drawings, and the configuration of Sphinx, which builds it (make docs)."""
