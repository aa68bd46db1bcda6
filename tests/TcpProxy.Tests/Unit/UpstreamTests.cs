using System;
using System.Linq;
using System.Net;
using Xunit;

namespace TcpProxy.Tests;

public sealed class UpstreamTests
{
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
        Assert.Equal(Parse(expected), Resolver.Interleave([.. Parse(given)], ip => ip.AddressFamily));
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
}
