using System;
using System.Collections.Generic;
using System.Linq;
using Xunit;

namespace TcpProxy.Tests;

public sealed class UpstreamSettingsTests
{
    [Fact]
    public void An_address_alone_has_the_defaults()
    {
        UpstreamSettings settings = UpstreamSettings.Parse("a:1");
        Assert.Equal(("a:1", 1, false, 0), (settings.Address.Text, settings.Weight, settings.IsBackup, settings.MaxConnections));
        Assert.Equal((TimeSpan.FromSeconds(10), null, null), (settings.SlowStart, settings.Name, settings.ServerNames));
    }

    [Fact]
    public void Settings_follow_the_address()
    {
        UpstreamSettings settings = UpstreamSettings.Parse(
            " a:1  weight=3 backup\tmax-connections=50 slow-start=1m name=first ");
        Assert.Equal(("a:1", 3, true, 50), (settings.Address.Text, settings.Weight, settings.IsBackup, settings.MaxConnections));
        Assert.Equal((TimeSpan.FromMinutes(1), "first"), (settings.SlowStart, settings.Name));
        Assert.Equal(0, UpstreamSettings.Parse("a:1 weight=0").Weight);
        Assert.Equal(256, UpstreamSettings.Parse("a:1 weight=256").Weight);
        Assert.Equal(TimeSpan.Zero, UpstreamSettings.Parse("a:1 slow-start=off").SlowStart);
    }

    [Fact]
    public void The_path_of_a_unix_socket_may_have_blanks() =>
        Assert.Equal(("/a b", 2), (UpstreamSettings.Parse("unix:/a b weight=2").Address.Host,
            UpstreamSettings.Parse("unix:/a b weight=2").Weight));

    [Theory]
    [InlineData("a:1 wieght=3", "unknown setting 'wieght'; did you mean 'weight'?")]
    [InlineData("a:1 bakcup", "unknown setting 'bakcup'; did you mean 'backup'?")]
    [InlineData("a:1 weight=257", "weight: '257' is not between 0 and 256")]
    [InlineData("a:1 weight=x", "weight: 'x' is not a number")]
    [InlineData("a:1 weight", "weight: needs a value, as in weight=5")]
    [InlineData("a:1 backup=yes", "backup: takes no value")]
    [InlineData("a:1 name=", "name: a name has at least one character")]
    [InlineData("a:1 max-connections=-1", "max-connections: '-1' is not a number")]
    [InlineData("a:1 slow-start=x", "slow-start: 'x' is not a time; write 500ms, 5s, 10m, 1h, 7d or off")]
    [InlineData("weight=3", "'weight=3' has no port; an address is HOST:PORT")]
    public void A_mistake_is_answered_with_what_was_probably_meant(string text, string message)
    {
        FormatException e = Assert.Throws<FormatException>(() => UpstreamSettings.Parse(text));
        Assert.Equal(message, e.Message);
    }

    [Theory]
    [InlineData("8080 a:80 weight=3 b:80 backup weight=2")]
    [InlineData("-l 8080 -u a:80 weight=3 -u b:80 backup weight=2")]
    [InlineData("--listen 8080 --upstream=a:80 weight=3 -q -ub:80 backup weight=2")]
    public void On_the_command_line_they_may_be_words_of_their_own(string line)
    {
        List<UpstreamSettings> upstreams = CommandLine.Parse(line.Split(' ')).Routes.Single().Upstreams;
        Assert.Equal(["a:80", "b:80"], upstreams.ConvertAll(u => u.Address.Text));
        Assert.Equal([3, 2], upstreams.ConvertAll(u => u.Weight));
        Assert.Equal([false, true], upstreams.ConvertAll(u => u.IsBackup));
    }

    [Fact]
    public void In_one_quoted_word_or_in_a_file_they_are_the_rest_of_it()
    {
        Choice typed = CommandLine.ReadFile("f", "upstream a:80 weight=3 name=\"b\"").Single();
        Assert.Equal(("upstream", "a:80 weight=3 name=\"b\""), (typed.Name, typed.Value));
        UpstreamSettings settings = CommandLine.Parse(["8080", "a:80 weight=3 backup"]).Routes.Single().Upstreams.Single();
        Assert.Equal((3, true), (settings.Weight, settings.IsBackup));
    }

    [Theory]
    [InlineData("8080 weight=3 a:80", "'weight=3': a setting of an upstream stands right after its address")]
    [InlineData("8080 a:80 --retries 3 weight=3", "'weight=3': a setting of an upstream stands right after its address")]
    [InlineData("backup", "'backup': a setting of an upstream stands right after its address")]
    [InlineData("8080 a:80 wieght=3", "UPSTREAM: unknown setting 'wieght'; did you mean 'weight'?")]
    [InlineData("-l 8080 -u a:80 wieght=3", "-u: unknown setting 'wieght'; did you mean 'weight'?")]
    public void A_setting_without_its_upstream_is_refused(string line, string message)
    {
        FormatException e = Assert.Throws<FormatException>(() => CommandLine.Parse(line.Split(' ')));
        Assert.Equal(message, e.Message);
    }
}
