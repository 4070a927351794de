from __future__ import annotations

from dataclasses import replace
from urllib.parse import quote_plus

import pytest

from analysis.errors import AnalysisError
from analysis.runs.study_runs import StudyAddress, study_runs
from analysis.runs.urls import hide_password, without_credentials


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("sqlite:////a/mlflow.db", "sqlite:////a/mlflow.db"),
        ("sqlite:////a/x:y@z.db", "sqlite:////a/x:y@z.db"),
        ("http://host:5000", "http://host:5000"),
        ("http://127.0.0.1:5000/#/experiments/1", "http://127.0.0.1:5000/#/experiments/1"),
        ("postgresql://me@host:5432/db?connect_timeout=3", "postgresql://me@host:5432/db?connect_timeout=3"),
        ("postgresql://me:p@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se:cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:sec/ret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:a/b#c@d@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:a[b?c@host/db", "postgresql://me:***@host/db"),
        ("postgresql+psycopg://:secret@host/db", "postgresql+psycopg://:***@host/db"),
        ("https://TOKEN@host/x", "https://***@host/x"),
        ("HTTPS://TOKEN@host/x", "HTTPS://***@host/x"),
        ("s3://KEY:SECRET@bucket/x", "s3://KEY:***@bucket/x"),
        ("me:secret@host/db", "me:***@host/db"),
        ("mysql://host/db?ssl_password=se-cret", "mysql://host/db?ssl_password=***"),
        ("mysql://host/db?password=secret%2F99&x=1", "mysql://host/db?password=***&x=1"),
        ("mysql://host/db?x=1&PassWord=secret", "mysql://host/db?x=1&PassWord=***"),
        ("https://host/x?sig=ab%3D", "https://host/x?sig=***"),
        ("https://host/x;token=abcd/y;version=2", "https://host/x;token=***;version=2"),
        ("https://host/x#access_token=abcd", "https://host/x#access_token=***"),
        ("jdbc:sqlserver://host;user=me;password=abcd", "jdbc:sqlserver://host;user=me;password=***"),
        ("mssql+pyodbc:///?odbc_connect=" + quote_plus("SERVER=h;UID=me;PWD=a;b"), "mssql+pyodbc:///?odbc_connect=***"),
    ],
)
def test_hide_password_shows_all_but_the_secrets(uri, shown):
    assert hide_password(uri) == shown
    assert hide_password(f"cannot open {uri}: refused", uri) == f"cannot open {shown}: refused"


@pytest.mark.parametrize(
    ("uri", "said", "shown"),
    [
        ("mysql://me:p%40ss%2Fw@host/db", "access denied (using p@ss/w)", "access denied (using ***)"),
        ("mysql://host/db?password=a%2Fbcd", "no a/bcd, no a%2Fbcd", "no ***, no ***"),
        ("mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3Dgeheim", "login me, geheim failed", "login me, *** failed"),
        (
            "s3://bucket/x",
            "403 at https://host/x?X-Amz-Signature=abcd&y=1",
            "403 at https://host/x?X-Amz-Signature=***&y=1",
        ),
        ("s3://bucket/x", "moved to http://me:abc@host/x, again", "moved to http://me:***@host/x, again"),
        ("mysql://me:is@host/db", "this is not there: me:is@host", "this is not there: me:***@host"),
    ],
)
def test_hide_password_hides_what_a_message_quotes(uri, said, shown):
    assert hide_password(said, uri) == shown


@pytest.mark.parametrize(
    "uri",
    ["http://me:sec/ret@host:5000/x?token=secret", "http://secret@host:5000/x", "http://host:5000/x;password=secret"],
)
def test_link_to_a_server_has_its_address_alone(uri):
    assert without_credentials(uri) == "http://host:5000/x"


@pytest.mark.parametrize(
    "uri", ["mysql://h/db?password=geheim", "http://geheim@h", "http://me:geh/eim@h", "mysql://h/db;pwd=geheim"]
)
def test_report_shows_no_secret_of_where_the_runs_are(runs, uri):
    assert "eim" not in replace(runs, address=StudyAddress(uri, "some")).data_source
    with pytest.raises(AnalysisError, match="holds no runs") as error:
        study_runs(StudyAddress(uri, "some"), [], [])
    assert "eim" not in str(error.value)
