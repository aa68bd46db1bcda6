using System;
using System.Collections.Generic;
using System.Linq;
using System.Net;
using Xunit;

namespace TcpProxy.Tests;

public sealed class UpstreamTests
{
    [Fact]
    public void The_server_with_the_fewest_connections_is_next_and_ties_take_turns()
    {
        UpstreamPool pool = Pool("a:1", "b:1", "c:1");
        Dictionary<string, int> picks = [];
        for (int i = 0; i < 300; i++)
        {
            TcpProxy.Upstream picked = pool.Pick([]);
            picked.Active++;
            picks[picked.Address.Text] = picks.GetValueOrDefault(picked.Address.Text) + 1;
        }

        Assert.Equal([100, 100, 100], picks.Values);
        TcpProxy.Upstream least = pool.Pick([]);
        least.Active -= 2;
        Assert.Same(least, pool.Pick([]));
        Assert.Same(least, pool.Pick([]));
    }

    [Fact]
    public void Those_tried_are_not_tried_again()
    {
        UpstreamPool pool = Pool("a:1", "b:1", "c:1");
        List<TcpProxy.Upstream> tried = [pool.Pick([])];
        tried.Add(pool.Pick(tried));
        tried.Add(pool.Pick(tried));
        Assert.Equal(3, tried.Distinct().Count());
    }

    [Theory]
    [InlineData("1.1.1.1 1.1.1.2 ::1 ::2", "1.1.1.1 ::1 1.1.1.2 ::2")]
    [InlineData("::1 ::2 ::3 1.1.1.1", "::1 1.1.1.1 ::2 ::3")]
    [InlineData("::1 1.1.1.1 1.1.1.2 1.1.1.3", "::1 1.1.1.1 1.1.1.2 1.1.1.3")]
    [InlineData("1.1.1.1", "1.1.1.1")]
    [InlineData("", "")]
    public void Families_take_turns_beginning_with_the_first(string given, string expected)
    {
        static IPAddress[] Parse(string text) =>
            [.. text.Split(' ', StringSplitOptions.RemoveEmptyEntries).Select(IPAddress.Parse)];
        Assert.Equal(Parse(expected), Resolver.Interleave(Parse(given)));
    }

    [Fact]
    public void A_limit_holds_here_and_in_what_encloses_it()
    {
        ConnectionLimit process = new(3, null);
        ConnectionLimit first = new(2, process);
        ConnectionLimit second = new(0, process);
        Assert.True(first.TryEnter());
        Assert.True(first.TryEnter());
        Assert.False(first.TryEnter());
        Assert.True(second.TryEnter());
        Assert.False(second.TryEnter());
        first.Leave();
        Assert.True(second.TryEnter());
        Assert.False(first.TryEnter()); // the process is full, and this attempt has left no trace:
        second.Leave();
        Assert.True(first.TryEnter());
    }

    private static UpstreamPool Pool(params string[] addresses)
    {
        List<UpstreamSettings> parsed = [.. addresses.Select(UpstreamSettings.Parse)];
        return new UpstreamPool(parsed, new ConnectSettings(), "", new Log(new LogSettings { Format = LogFormat.Off }));
    }
}
