from tests.convert.models import converted as converted
