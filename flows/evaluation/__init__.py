"""Evaluation of a base and its adapter on held-out rows: chats, preference pairs, and labelled texts."""
