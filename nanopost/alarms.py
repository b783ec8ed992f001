"""Alarms: what a run's metrics say about illnesses."""


class Alarms:
    def add(self, line: dict) -> list[dict]:
        return []
