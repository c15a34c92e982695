"""Judging a base and its adapter on held-out rows: chats by answers, pairs by what is preferred, texts by class."""
