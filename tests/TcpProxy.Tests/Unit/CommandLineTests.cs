using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Net;
using Xunit;

namespace TcpProxy.Tests;

public sealed class CommandLineTests
{
    [Fact]
    public void Every_option_is_declared_once_and_described()
    {
        Assert.Equal(Option.Table.Length, Option.Table.Select(o => o.Name).Distinct().Count());
        char[] letters = [.. Option.Table.Select(o => o.Letter).Where(c => c != '\0')];
        Assert.Equal(letters.Length, letters.Distinct().Count());
        foreach (Option option in Option.Table)
        {
            Assert.Matches("^[a-z][a-z0-9-]+$", option.Name);
            Assert.EndsWith(".", option.Help, StringComparison.Ordinal);
            Assert.True(char.IsUpper(option.Help[0]), option.Name);
            Assert.True(option.IsFlag || option.Value.Length > 0);
            Assert.True(option.Default.Length == 0 || !option.IsFlag, $"{option.Name} is a flag with a default");
        }
    }

    [Fact]
    public void Options_of_a_group_stand_together()
    {
        List<string> groups = [.. Option.Table.Select(o => o.Group)];
        int changes = groups.Zip(groups.Skip(1)).Count(pair => pair.First != pair.Second);
        Assert.Equal(groups.Distinct().Count() - 1, changes);
    }

    [Fact]
    public void The_defaults_are_those_of_the_design()
    {
        RouteSettings route = One("8080", "echo");
        Assert.Equal(TimeSpan.FromSeconds(5), route.Connect.Timeout);
        Assert.Equal(3, route.Connect.Retries);
        Assert.Equal(TimeSpan.FromSeconds(30), route.Connect.Resolve);
        Assert.Equal(TimeSpan.FromHours(1), route.Bridge.IdleTimeout);
        Assert.Equal(TimeSpan.FromSeconds(60), route.Bridge.FinTimeout);
        Assert.Equal(TimeSpan.FromSeconds(60), route.Bridge.Keepalive);
        Assert.Equal(TimeSpan.Zero, route.Bridge.MaxLifetime);
        Assert.Equal(65536, route.Bridge.BufferSize);
        Assert.Equal(0, route.MaxConnections);
        Settings settings = CommandLine.Parse(["8080", "echo"]);
        Assert.Equal(TimeSpan.FromSeconds(30), settings.DrainTimeout);
        Assert.Equal(LogFormat.Text, settings.Log.Format);
        Assert.Equal(LogLevel.Info, settings.Log.Level);
        Assert.Equal(0, settings.Threads);
    }

    [Fact]
    public void The_original_four_arguments_are_a_route()
    {
        RouteSettings route = One("127.0.0.1", "8080", "example.org", "80", "--idle-timeout", "5m");
        Assert.Equal("127.0.0.1:8080", route.Listen!.Text);
        Assert.Equal("example.org:80", route.Upstreams.Single().Address.Text);
        Assert.Equal(TimeSpan.FromMinutes(5), route.Bridge.IdleTimeout);
        Assert.Equal("[::1]:80", One("::1", "8080", "::1", "80").Upstreams.Single().Address.Text);
    }

    [Fact]
    public void The_short_form_takes_several_upstreams()
    {
        RouteSettings route = One("--retries", "1", ":80", "a:1", "b:2", "unix:/c");
        Assert.Equal(["a:1", "b:2", "unix:/c"], route.Upstreams.ConvertAll(u => u.Address.Text));
        Assert.Equal(1, route.Connect.Retries);
        Assert.Equal(":80", route.Title);
    }

    [Fact]
    public void Four_ports_are_one_listen_and_three_upstreams() =>
        Assert.Equal(3, One("8080", "9001", "9002", "9003").Upstreams.Count);

    [Fact]
    public void Options_before_the_first_listen_are_defaults_and_those_after_it_belong_to_it()
    {
        Settings settings = CommandLine.Parse(
            ["--idle-timeout=1m", "-u", "z:9", "-l", "1", "-u", "a:1", "--idle-timeout", "2m", "-l2", "--name", "two"]);
        Assert.Equal(["1", "two"], settings.Routes.ConvertAll(r => r.Title));
        Assert.Equal(["z:9", "a:1"], settings.Routes[0].Upstreams.ConvertAll(u => u.Address.Text));
        Assert.Equal(["z:9"], settings.Routes[1].Upstreams.ConvertAll(u => u.Address.Text));
        Assert.Equal(TimeSpan.FromMinutes(2), settings.Routes[0].Bridge.IdleTimeout);
        Assert.Equal(TimeSpan.FromMinutes(1), settings.Routes[1].Bridge.IdleTimeout);
    }

    [Fact]
    public void A_connection_limit_before_the_first_listen_bounds_the_process_too()
    {
        Settings settings = CommandLine.Parse(
            ["--max-connections", "9", "-l", "1", "-u", "a:1", "--max-connections", "5", "-l", "2", "-u", "b:2"]);
        Assert.Equal(9, settings.MaxConnections);
        Assert.Equal([5, 9], settings.Routes.ConvertAll(r => r.MaxConnections));
    }

    [Theory]
    [InlineData("-qv", LogLevel.Debug)]
    [InlineData("-vq", LogLevel.Warn)]
    public void Letters_cluster(string cluster, object level) =>
        Assert.Equal(level, CommandLine.Parse([cluster, "80", "echo"]).Log.Level);

    [Fact]
    public void Two_dashes_end_the_options()
    {
        FormatException e = Assert.Throws<FormatException>(() => CommandLine.Parse(["--", "80", "--once"]));
        Assert.StartsWith("UPSTREAM: '--once' has no port", e.Message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("-h", Command.ShortHelp)]
    [InlineData("--help", Command.FullHelp)]
    [InlineData("-V", Command.Version)]
    [InlineData("--version", Command.Version)]
    public void Commands_need_no_route(string word, object command)
    {
        Assert.Equal(command, CommandLine.Parse([word]).Command);
        Assert.Equal(command, CommandLine.Parse(["80", "echo", word]).Command);
    }

    [Fact]
    public void The_command_line_wins_over_the_file_in_every_route()
    {
        string file = Path.GetTempFileName();
        try
        {
            File.WriteAllText(file, """
                # defaults
                idle-timeout 1m
                fin-timeout  7s   # of every route
                listen 1
                  upstream a:1
                  idle-timeout 2m
                listen "2"
                upstream b:2
                name "the second # one"
                """);
            Settings settings = CommandLine.Parse(
                ["-c", file, "--idle-timeout", "9m", "-l", "3", "-u", "c:3", "--fin-timeout", "8s"]);
            Assert.Equal(["1", "the second # one", "3"], settings.Routes.ConvertAll(r => r.Title));
            Assert.All(settings.Routes, r => Assert.Equal(TimeSpan.FromMinutes(9), r.Bridge.IdleTimeout));
            Assert.All(CommandLine.Parse(["-c", file, "-u", "x:1", "-u", "y:1"]).Routes,
                r => Assert.Equal(["x:1", "y:1"], r.Upstreams.ConvertAll(u => u.Address.Text)));
            Assert.Equal([7, 7, 8], settings.Routes.ConvertAll(r => (int)r.Bridge.FinTimeout.TotalSeconds));
        }
        finally
        {
            File.Delete(file);
        }
    }

    [Theory]
    [InlineData("idle-timeot 5s", "f:1: idle-timeot: unknown option; did you mean 'idle-timeout'?")]
    [InlineData("\n--listen 80", "f:2: --listen: unknown option; did you mean 'listen'?")]
    [InlineData("listen", "f:1: listen: needs a value ADDR")]
    [InlineData("once yes", "f:1: once: takes no value, but 'yes' was given")]
    [InlineData("help", "f:1: help: belongs on the command line, not in a file")]
    [InlineData("config other", "f:1: config: belongs on the command line, not in a file")]
    [InlineData("name \"x", "f:1: a quote is not closed")]
    [InlineData("name \"x\" y\"\"", "f:1: a quoted value ends at its second quote")]
    public void A_mistake_in_a_file_is_answered_with_its_line(string text, string message)
    {
        FormatException e = Assert.Throws<FormatException>(() => CommandLine.ReadFile("f", text));
        Assert.Equal(message, e.Message);
    }

    [Theory]
    [InlineData("--sourc 1", "--sourc: unknown option; did you mean '--source'?")]
    [InlineData("--zzzzzzz", "--zzzzzzz: unknown option; 'tcpproxy -h' lists them")]
    [InlineData("--source 1.2.3.4.5 80 echo", "--source: '1.2.3.4.5' is not an IP address")]
    [InlineData("--threads 0 80 echo", "--threads: '0' is not between 1 and 256")]
    [InlineData("--buffer-size 17m 80 echo", "--buffer-size: '17m' is not between 256 and 16m")]
    [InlineData("--log xml 80 echo", "--log: unknown format 'xml'; it is one of text, json, haproxy, syslog, off")]
    [InlineData("80 echo once", "UPSTREAM: 'once' is no address; did you mean '--once'?")]
    [InlineData("80 echo -l 90", "'80': give the route either as LISTEN UPSTREAM or with --listen, not both")]
    [InlineData("--wait-for 80 90", "'90': --wait-for takes one address and serves no route")]
    public void A_mistake_is_answered_with_what_was_probably_meant(string line, string message)
    {
        FormatException e = Assert.Throws<FormatException>(() => CommandLine.Parse(line.Split(' ')));
        Assert.Equal(message, e.Message);
    }

    [Fact]
    public void Settings_of_one_route_do_not_leak_into_another()
    {
        RouteSettings route = One("--source", "127.0.0.2", "80", "echo");
        RouteSettings copy = route.Clone();
        copy.Connect.Source = IPAddress.Loopback;
        copy.Bridge.BufferSize = 1;
        copy.Upstreams.Clear();
        Assert.Equal("127.0.0.2", route.Connect.Source!.ToString());
        Assert.Equal(65536, route.Bridge.BufferSize);
        Assert.Single(route.Upstreams);
    }

    private static RouteSettings One(params string[] arguments) => CommandLine.Parse(arguments).Routes.Single();
}
