"""Small trained additions to frozen networks."""
