"""The whole system as processes of its own, and what it does when parts die or what it is given is wrong."""
