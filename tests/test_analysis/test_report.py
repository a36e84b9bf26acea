from mmdynsparse.analysis.report import latency_table, name, plot_latency, verdict


def row(model, ratios, median, ideal, batch=1):
    return dict(
        part='backbone',
        batch=batch,
        size='64x64',
        model=model,
        keep_ratios=ratios,
        gmacs=4 / ideal,
        median=median,
        p10=0.9 * median,
        p90=1.2 * median,
        speed_up=10 / median,
        ideal=ideal,
        peak_mib=3.0,
    )


ROWS = [
    row('dense', [], 10.0, 1.0),
    row('sparse', [0.7, 0.5], 12.5, 1.25),
    row('sparse', [0.3, 0.1], 5.0, 2.5),
]


def test_slower_is_called_slower():
    assert [verdict(r) for r in ROWS] == ['1', '0.80 x, slower', '2.00 x']


def test_table_is_whole_without_a_terminal(capsys):
    latency_table(ROWS)
    output = capsys.readouterr().out
    for cell in ('sparse 0.7 0.5', '12.50', '15.00', '0.80 x, slower', '2.50 x', 'peak MiB'):
        assert cell in output


def test_plot_shows_measured_and_ideal_latency(tmp_path, monkeypatch):
    figures = []

    class Figure:
        from matplotlib.figure import Figure as Original

        def __new__(cls, **kwargs):
            figures.append(cls.Original(**kwargs))
            return figures[-1]

    monkeypatch.setattr('mmdynsparse.analysis.report.Figure', Figure)
    rows = ROWS + [row(r['model'], r['keep_ratios'], r['median'], 1.0, batch=2) for r in ROWS]
    plot_latency(rows, tmp_path / 'new/plot.png', 'title')
    assert (tmp_path / 'new/plot.png').stat().st_size > 1000
    first, second = figures[0].axes
    lines = {line.get_label(): line for line in first.lines}
    assert list(lines['dense'].get_ydata()) == [10, 10]
    assert list(lines['ideal, by GMACs'].get_xdata()) == [0.2, 0.6]
    assert list(lines['ideal, by GMACs'].get_ydata()) == [4, 8]
    assert list(first.containers[0].lines[0].get_ydata()) == [5, 12.5]
    assert second.get_title() == 'backbone, batch 2, 64x64 px'


def test_names():
    assert [name(r) for r in ROWS] == ['dense', 'sparse 0.7 0.5', 'sparse 0.3 0.1']
    assert name(row('sparse', [0.5] * 12, 1.0, 1.0)) == 'sparse 12 x 0.5'
