"""What plugins are held to. Subclass these in your own tests; pytest collects them::

    from tuner.testing.contract import PluginContract

    class TestMyPlugin(PluginContract):
        plugin = "my_plugin"

A model family subclasses :class:`FamilyContract` beside it. ``tuner plugins check`` runs the same without pytest.
"""

from tuner.testing.contract.family import FamilyContract
from tuner.testing.contract.plugin import HEAVY, PluginContract, imported_by, names_of

__all__ = ["HEAVY", "FamilyContract", "PluginContract", "imported_by", "names_of"]
